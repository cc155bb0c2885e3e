"""`python -m llmfast`, for where no scripts are installed."""

import sys

from llmfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
