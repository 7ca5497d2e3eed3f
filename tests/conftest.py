import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # such small tensors are slower on more threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # test_hub.py brings its own Hub
sys.path.insert(0, str(Path(__file__).parent.parent))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores them
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")  # its own
