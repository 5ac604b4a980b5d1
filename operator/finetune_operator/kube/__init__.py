"""An engine for controllers: transport, reflector, store, queue, election. It knows nothing of FineTuneJob.

The layers, each using only those below it (docs/adr/008-operator-engine.md)::

    workers  reflector  lease  events
    workqueue      client  store
               transport
              credentials
    errors  settings  metrics  backoff  objects
"""

from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.events import Recorder
from finetune_operator.kube.lease import Elector
from finetune_operator.kube.metrics import Metrics
from finetune_operator.kube.objects import Object, controller_uid, key_of, split_key
from finetune_operator.kube.reflector import Reflector
from finetune_operator.kube.settings import EventSettings, HTTPSettings, LeaseSettings, QueueSettings, ReflectorSettings
from finetune_operator.kube.store import Store
from finetune_operator.kube.workers import run_workers
from finetune_operator.kube.workqueue import QueueClosedError, WorkQueue

__all__ = [
    "Client",
    "Elector",
    "EventSettings",
    "HTTPSettings",
    "LeaseSettings",
    "Metrics",
    "Object",
    "QueueClosedError",
    "QueueSettings",
    "Recorder",
    "Reflector",
    "ReflectorSettings",
    "Resource",
    "Store",
    "WorkQueue",
    "controller_uid",
    "key_of",
    "run_workers",
    "split_key",
]
