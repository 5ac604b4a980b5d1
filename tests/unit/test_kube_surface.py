import subprocess
import sys

from finetune_operator import kube
from finetune_operator.kube import errors


def test_what_the_package_exports_is_there_and_sorted() -> None:
    """``__all__`` names what there is, each once, in order: it is what a controller may rely on."""
    assert all(hasattr(kube, name) for name in kube.__all__)
    assert kube.__all__ == sorted(set(kube.__all__))


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    """Each class stands in the module's drawing, at the depth that its bases say."""
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        if "Error" in line and (line.strip().startswith(("├", "└", "│")) or line.strip() == "KubeError"):
            name = line.strip(" │├└─").split()[0]
            drawn[name] = (line.index(name) - 4) // 4
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.KubeError)]
    assert drawn == {c.__name__: len(c.__mro__) - len(errors.KubeError.__mro__) for c in classes}


def test_importing_the_engine_is_light() -> None:
    """The official client's thousands of generated models stay unread: they would cost 100 MB."""
    code = (
        "import sys, finetune_operator.kube; "
        "print(sum(m.startswith('kubernetes') and '.models.' in m for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
