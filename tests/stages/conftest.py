from tests.stages.finished_run import finished, start_run
from tests.stages.training_job import make_job, tiny_model
from tests.store.conftest import store_server

__all__ = ["finished", "make_job", "start_run", "store_server", "tiny_model"]
