"""The linear classifier of a probe."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def is_right(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> np.ndarray:  # fmt: skip
    """Of each test sample, whether logistic regression on standardised features is right about it, bool [samples].

    x: float64 [samples, D]. y: labels [samples].
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
    classifier.fit(train_x, train_y)
    return classifier.predict(test_x) == test_y
