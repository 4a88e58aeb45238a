"""What a plugin may rest on changes on purpose alone."""

from tests import public_api


def test_the_public_surface_is_the_recorded_one():
    recorded, now = (text.splitlines() for text in (public_api.RECORD.read_text(encoding="utf-8"),
                                                    public_api.surface()))
    gone, new = [line for line in recorded if line not in now], [line for line in now if line not in recorded]
    assert (gone, new) == ([], []), ("if that is meant: warn of what goes for a release, raise API_VERSION, and "
                                     "`python -m tests.public_api`")


def test_the_api_version_is_stated():
    import tryplicity

    assert tryplicity.API_VERSION == 1
