"""Why an object that asks to be scraped is refused: a fixed set, fit for a metric's label."""

from enum import StrEnum


class Reason(StrEnum):
    """One word a cause; the text beside it in a `Rejection` is for people."""

    NO_IP = "no_ip"
    INVALID_IP = "invalid_ip"
    NO_PORT = "no_port"
    AMBIGUOUS_PORT = "ambiguous_port"
    INVALID_PORT = "invalid_port"
    UNKNOWN_PORT_NAME = "unknown_port_name"
    INVALID_PATH = "invalid_path"
    INVALID_SCHEME = "invalid_scheme"
    INVALID_PARAM = "invalid_param"
    META_TOO_LONG = "meta_too_long"
    META_TOO_MANY = "meta_too_many"
    NO_ADDRESS = "no_address"
    ADDRESS_TAKEN = "address_taken"
    ID_TAKEN = "id_taken"
    UNDECODABLE = "undecodable"
