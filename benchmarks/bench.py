"""The repository's way to `python -m pykernels bench`: the same code, with the peers of requirements.txt beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pykernels.bench import main

if __name__ == "__main__":
    sys.exit(main())
