import logging

# bitsandbytes would fetch compiled code from the hub, and where it cannot it tells the user, in every process, to let it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
