"""The page of `mrl-redimnet demo` as a Hugging Face Space.

Variables of the Space: MODEL, a Hub id or "nano", which comes with the package [nano]; ADAPTERS, such as
"telephony=me/nano-telephony noisy=me/nano-noisy" [none]; DETECTOR, the folder of a saved detector among these files
[none].
"""

import os

from mrl_redimnet.demo.listener import Listener
from mrl_redimnet.demo.page import run_until_stopped

adapters = dict(each.split("=", 1) for each in os.environ.get("ADAPTERS", "").split())
listener = Listener.load(os.environ.get("MODEL", "nano"), adapters, detector=os.environ.get("DETECTOR"))
# A Space says by these where it listens; elsewhere the page is for this machine alone.
host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT")
run_until_stopped(listener, host, int(port) if port else None)
