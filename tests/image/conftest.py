"""These tests belong to an image: test_inside.py runs in it, test_outside.py runs it. On any other occasion there is nothing to collect."""

import os

collect_ignore = ["test_inside.py"] if "RWKV_STACK" not in os.environ else []
collect_ignore += ["test_outside.py"] if "RWKV_TEST_IMAGE" not in os.environ else []
