"""Where the pages are that messages and the tab send to."""

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
