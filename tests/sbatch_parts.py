"""What the tests of sbatch scripts share."""


def lines(text: str) -> list[list[str]]:
    """The #SBATCH options of each component."""
    components: list[list[str]] = [[]]
    for line in text.splitlines():
        if line == "#SBATCH hetjob":
            components.append([])
        elif line.startswith("#SBATCH "):
            components[-1].append(line.removeprefix("#SBATCH "))
    return components
