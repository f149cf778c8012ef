"""Put into processes by ``launch.torchrun``: one that has not ended in time prints where each of its threads is, and
ends. What waits for it then ends too, and the test shows it instead of waiting for ever."""

import faulthandler
import os

faulthandler.dump_traceback_later(float(os.environ["INQ_TEST_SECONDS"]), exit=True)
