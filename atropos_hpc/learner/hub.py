"""Upload an exported model to the Hugging Face Hub. The only file that uses its API.

HF_TOKEN, or the token of `hf auth login`, says who uploads; HF_ENDPOINT names another server.
"""

from pathlib import Path

from huggingface_hub import HfApi


class PushFailed(Exception):
    """The Hub cannot be reached, or refuses."""


def prepare(name: str, public: bool) -> None:
    """Create the repository, private unless `public`; keep one that exists. Raises PushFailed."""
    try:
        HfApi().create_repo(name, private=not public, exist_ok=True)
    except Exception as error:  # of huggingface_hub, httpx or the token's lookup
        hint = "check the name, and set HF_TOKEN to a token that may write"
        raise PushFailed(f"cannot create {name} on the Hub: {error}; {hint}") from None


def push(directory: Path, name: str, step: int) -> str:
    """Upload a directory as one commit, and return its address. Raises PushFailed."""
    try:
        message = f"Weights after step {step}"
        return str(
            HfApi().upload_folder(repo_id=name, folder_path=directory, commit_message=message)
        )
    except Exception as error:
        hint = f"to try it again: hf upload {name} {directory}"
        raise PushFailed(f"cannot upload {directory} to {name}: {error}; {hint}") from None
