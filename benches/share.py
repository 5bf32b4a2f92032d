"""What it costs to give a worker a large array and to have it back: `tractor-host bench share`."""

import sys

from tractor_host.bench.share import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
