"""Addresses of the pages to which messages and the tab link."""

SITE = "https://lightning-lowrank.readthedocs.io/"


def page(path: str) -> str:
    """The address of a page.

    Args:
        path: Of its file in `docs/`, without the suffix.

    Examples:
        >>> page("monitors/rank")
        'https://lightning-lowrank.readthedocs.io/monitors/rank/'
    """
    return f"{SITE}{path}/"
