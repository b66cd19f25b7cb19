"""A Prefect of its own for the session: a fresh database, a server on loopback, nothing of the user's."""

import pytest


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401  sets what Prefect reads when it is imported

    with prefect_test_harness(server_startup_timeout=180):
        yield
