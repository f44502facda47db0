"""Durations are read as Prometheus reads them."""

import pytest

from k8s_consul_registrar.targets.annotations import parse_duration


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("15s", 15_000),
        ("1m30s", 90_000),
        ("90s", 90_000),
        ("1h0m1ms", 3_600_001),
        ("250ms", 250),
        ("1d12h", 129_600_000),
        ("1w", 604_800_000),
        ("1y2w3d4h5m6s7ms", 31_536_000_000 + 2 * 604_800_000 + 3 * 86_400_000 + 14_706_007),
        ("007s", 7000),
        ("292y", 292 * 31_536_000_000),
    ],
)
def test_duration_is_a_sum_of_units(text: str, milliseconds: int) -> None:
    """The text stays as it was given."""
    assert parse_duration(text) == (text, milliseconds)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "s",
            "15",
            "-1s",
            "+1s",
            "1.5s",
            "1 s",
            " 1s",
            "1s ",
            "1S",
            "1M",
            "1us",
            "1ns",
            "1s30m",
            "1s1s",
        ),
        *("1m1h", "1ms1s", "٣s", "1s\n", "00", "1e3s", "0x1s"),
    ],
)
def test_text_in_another_form_is_no_duration(text: str) -> None:
    """Each unit appears once at most, the largest first."""
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["293y", "9223372036855s", "9" * 90 + "s"])
def test_duration_beyond_64_bits_of_nanoseconds_is_refused(text: str) -> None:
    """Prometheus refuses it as well."""
    with pytest.raises(ValueError, match="longer than Prometheus can count"):
        parse_duration(text)
