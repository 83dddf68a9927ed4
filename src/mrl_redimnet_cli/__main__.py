"""`python -m mrl_redimnet_cli`, for launchers such as torchrun that start modules."""

import sys

from mrl_redimnet_cli import main

if __name__ == "__main__":
    sys.exit(main())
