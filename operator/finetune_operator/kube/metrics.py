"""The engine's figures, under client-go's names where it has one. Passed in, so that a test sees only its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One set of figures in one registry. Labels are bounded: queues, resources, methods and codes, never names."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        to = self.registry
        self.depth = Gauge("workqueue_depth", "Keys that wait for a worker", ["name"], registry=to)
        self.adds = Counter("workqueue_adds_total", "Keys added, repetitions apart", ["name"], registry=to)
        self.retries = Counter("workqueue_retries_total", "Keys put back after a failure", ["name"], registry=to)
        self.queue_time = Histogram(
            "workqueue_queue_duration_seconds",
            "From add to a worker",
            ["name"],
            buckets=_SECONDS,
            registry=to,
        )
        self.reconcile_time = Histogram(
            "reconcile_time_seconds", "One call of the handler", ["name"], buckets=_SECONDS, registry=to
        )
        self.reconcile_errors = Counter(
            "reconcile_errors_total", "Calls of the handler that failed, conflicts apart", ["name"], registry=to
        )
        self.watch_restarts = Counter(
            "watch_restarts_total", "Watches that ended, by cause", ["resource", "cause"], registry=to
        )
        self.lists = Counter("reflector_lists_total", "Full lists, paged", ["resource"], registry=to)
        self.cached = Gauge("reflector_objects", "Objects in the cache", ["resource"], registry=to)
        self.requests = Counter(
            "rest_client_requests_total", "Requests, by method and code (or error)", ["method", "code"], registry=to
        )
        self.is_leader = Gauge("is_leader", "1 while this replica leads", ["name"], registry=to)
        self.events_dropped = Counter("events_dropped_total", "Kubernetes Events that were not sent", registry=to)
