"""`python -m fastlm` is the command `fastlm`."""

from fastlm.cli import main

if __name__ == "__main__":
    main()
