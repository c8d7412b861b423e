"""Collect the image tests only where they can run: test_inside.py in a container, test_outside.py
on a host with an image.
"""

import os

collect_ignore = ["test_inside.py"] if "RWKV_STACK" not in os.environ else []
collect_ignore += ["test_outside.py"] if "RWKV_TEST_IMAGE" not in os.environ else []
