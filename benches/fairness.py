"""What busy subinterpreters leave to the program and to each other: `tractor-host bench fairness`."""

import sys

from tractor_host.bench.fairness import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
