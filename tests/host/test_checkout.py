"""The one test that is always collected: it says why the others are not."""


def test_checkout_is_there(checkout):
    assert (checkout / "main.py").is_file()
