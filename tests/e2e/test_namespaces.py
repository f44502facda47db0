"""Namespaces that are left out and that are selected, as the daemon asks the API server for them."""

from support.cluster import rule
from support.lab import SandboxLab, running_lab

RIGHTS = [rule("list watch", "pods nodes namespaces"), rule("get", "namespaces")]
MERGE_PATCH = "application/merge-patch+json"
# The Pods of three namespaces.
SHOP, PAY, CI = "pod--shop--web-1", "pod--pay--web-1", "pod--ci--web-1"


async def label(lab: SandboxLab, namespace: str, value: str | None) -> None:
    """Give a namespace the label `scrape`, or take it away."""
    patch = {"metadata": {"labels": {"scrape": value}}}
    await lab.cluster.request("PATCH", f"/api/v1/namespaces/{namespace}", patch, content_type=MERGE_PATCH)


async def add_pods(lab: SandboxLab) -> None:
    """Add a Pod to each namespace."""
    for number, namespace in enumerate(("shop", "pay", "ci")):
        await lab.cluster.add_namespace(namespace)
        await lab.cluster.add_pod(namespace=namespace, ips=(f"198.51.100.{10 + number}",))


async def test_newly_excluded_namespace_keeps_its_services_for_the_long_wait() -> None:
    """After the restart they are held, and go when it is over."""
    async with running_lab() as lab:
        await add_pods(lab)
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(SHOP, PAY, CI))
        async with await lab.registrar(EXCLUDE_NAMESPACES="ci", BRAKE_CONFIRM_START="600") as daemon:
            await daemon.ready()
            await daemon.measures("brake_held_services", 1)
            assert lab.has(SHOP, PAY, CI)
        async with await lab.registrar(EXCLUDE_NAMESPACES="ci", BRAKE_CONFIRM_START="1") as daemon:
            await daemon.until(lambda: lab.has(SHOP, PAY))
            line = await daemon.until_said("service deregistered")
            assert len(daemon.said("service deregistered")) == 1
            assert (line["service"], line["proof"], line["brake"]) == (
                CI,
                "confirmed absence",
                "held for 1 s",
            )


async def test_namespaces_are_selected_by_their_labels() -> None:
    """One that gets the label brings its Pods; one that loses it keeps its services for the long wait."""
    async with running_lab() as lab:
        await add_pods(lab)
        await label(lab, "shop", "yes")
        lab.token_file.write_text(await lab.cluster.token(RIGHTS))
        environment = {"NAMESPACE_LABEL_SELECTOR": "scrape=yes", "BRAKE_CONFIRM_START": "1"}
        async with await lab.registrar(**environment) as daemon:
            await daemon.ready()
            assert lab.has(SHOP)
            await label(lab, "pay", "yes")
            await daemon.until(lambda: lab.has(SHOP, PAY))
            await label(lab, "shop", None)
            await daemon.until(lambda: lab.has(PAY))
            line = await daemon.until_said("service deregistered")
            assert len(daemon.said("service deregistered")) == 1
            assert (line["service"], line["proof"], line["brake"]) == (
                SHOP,
                "confirmed absence",
                "held for 1 s",
            )


async def test_without_the_right_to_namespaces_nothing_is_removed_and_the_source_is_named() -> None:
    """Neither by the daemon nor in what HTTP service discovery answers."""
    async with running_lab() as lab:
        await add_pods(lab)
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(SHOP, PAY, CI))
        async with await lab.registrar(NAMESPACE_LABEL_SELECTOR="scrape=yes") as daemon:
            await daemon.until_said("cannot list; nothing of it is deregistered meanwhile", "namespaces")
            status, text = await daemon.admin("/readyz")
            assert (status, "namespaces" in text) == (503, True)
            assert lab.has(SHOP, PAY, CI)
