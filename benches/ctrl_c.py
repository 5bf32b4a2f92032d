"""What one Ctrl-C does in each situation: `tractor-host bench ctrl-c`."""

import sys

from tractor_host.bench.ctrl_c import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
