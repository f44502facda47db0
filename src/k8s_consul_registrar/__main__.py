"""The entry point of `k8s-consul-registrar` and of `python -m k8s_consul_registrar`."""

import gc
import os
import signal

# Net allocations between two collections of the young generation; one takes about 1 ms.
YOUNG_OBJECTS = 10_000


def run() -> int:
    """Run the command and return its exit code.

    Loading the modules takes a part of a second, in which Ctrl-C would end in a traceback.
    """
    # Python's default of 700 made collections that found nothing: a tenth of the start, a fortieth of a first sync.
    gc.set_threshold(YOUNG_OBJECTS)
    gc.disable()  # modules are no garbage
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from k8s_consul_registrar.cli import main  # noqa: PLC0415 - only now: see above

    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main()


if __name__ == "__main__":
    raise SystemExit(run())
