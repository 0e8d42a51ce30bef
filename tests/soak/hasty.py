"""The connector's command line with waits of hundredths of a second: many reconnects in little time.

python -m tests.soak.hasty run --edge ...
"""

from __future__ import annotations

import sys

from connector.app.cli import main
from connector.protocol import reconnect

WAIT = 0.02

if __name__ == "__main__":
    reconnect.BASE_WAIT = reconnect.LOST_WAIT = WAIT
    sys.exit(main(sys.argv[1:]))
