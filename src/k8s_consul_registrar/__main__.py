"""The command, as `k8s-consul-registrar` and as `python -m k8s_consul_registrar`: quiet from its first moment."""

import gc
import os
import signal

# After so many more objects than were freed Python's collector looks at the young ones: a millisecond's work.
YOUNG_OBJECTS = 10_000


def run() -> int:
    """Run the command and return its exit code.

    Loading the modules takes a part of a second, in which Ctrl-C would end in a traceback.
    """
    # Python's 700 made a tenth of the start, and a fortieth of a first sync, collections that found nothing.
    gc.set_threshold(YOUNG_OBJECTS)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from k8s_consul_registrar.tls import without_authorities  # noqa: PLC0415 - only now: see above

    with without_authorities():
        from k8s_consul_registrar.cli import main  # noqa: PLC0415 - likewise

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main()


if __name__ == "__main__":
    raise SystemExit(run())
