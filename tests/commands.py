"Commands as a user types them, in processes of their own."
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent

def run(command, *args, cwd=None, ok=True, timeout=1200):
    "What a command prints; it has to succeed, or with `ok=False` to fail, and never with a traceback."
    done = subprocess.run([BIN/command, *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=timeout)
    assert (done.returncode==0)==ok, done.stdout+done.stderr
    assert 'Traceback' not in done.stderr, done.stderr
    return done.stdout+done.stderr
