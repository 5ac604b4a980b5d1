"""``python run_stand_in.py FILE``: ``finetune run FILE`` with the stand-in for its stages."""

import sys
from pathlib import Path

from finetune_cli import runs
from finetune_cli.ledger import home

if __name__ == "__main__":
    file = Path(sys.argv[1])
    job = runs.load_job(file)
    stand_in = (sys.executable, "-S", "-E", str(Path(__file__).with_name("stand_in.py")))
    status, code = runs.run(job, file, home(), quiet=False, command=stand_in)
    print(runs.summary(job, status, file, code))
    sys.exit(code)
