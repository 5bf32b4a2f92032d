"""What it costs to start a worker and to see its end: `tractor-host bench spawn`, for `make bench`."""

import sys

from tractor_host.bench.spawn import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
