from tests.stages.training_job import make_job, tiny_model
from tests.store.conftest import store_server

__all__ = ["make_job", "store_server", "tiny_model"]
