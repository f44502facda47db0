"""Addresses in one spelling, however they are read."""

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from k8s_consul_registrar.targets.scrape_config import parse_ip, scraped_address

TEXTS = st.one_of(
    st.ip_addresses().map(str),
    st.lists(st.integers(0, 300).map(str), min_size=3, max_size=5).map(".".join),
    st.text(alphabet="0123456789.:af%\n ", max_size=20),
)


@given(text=TEXTS)
@example("192.0.2.1\n")
@example("192.0.2.01")
@example("223.255.255.255")
@example("::ffff:192.0.2.1")
def test_short_cut_for_plain_addresses_says_what_the_whole_way_says(text: str) -> None:
    """An address can be scraped, in the same spelling, exactly when `parse_ip` finds a unicast one."""
    address = parse_ip(text)
    is_scraped = address is not None and not address.is_unspecified and not address.is_multicast
    assert scraped_address(text) == (str(address) if is_scraped else None)


@pytest.mark.parametrize(
    "address", [IPv4Address("0.0.0.0"), IPv4Address("224.0.0.1"), IPv6Address("ff02::1")]
)
def test_address_of_no_single_host_is_not_scraped(address: IPv4Address | IPv6Address) -> None:
    """The unspecified address and groups are no targets."""
    assert scraped_address(str(address)) is None
