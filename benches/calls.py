"""What a call costs to a worker that is there: `tractor-host bench calls`."""

import sys

from tractor_host.bench.calls import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
