"""`python -m atropos_hpc.learner`: one learner rank."""

import os

from atropos_hpc.learner.main import main

if __name__ == "__main__":
    # Not sys.exit: threads of torch's process group and of a pending publish would run into the
    # interpreter's shutdown. That sometimes makes the C++ runtime abort, with its own exit code.
    # Everything that had to be written has been waited for.
    os._exit(main())
