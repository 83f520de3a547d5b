"""A study under fire: its workers, nodes and driver are killed at seeded moments, and it must end as if they were not.

The study runs twice on a local cluster of several Ray nodes, each with one logical GPU: calmly, and while something is
killed again and again. `mebm` is started as a user starts it and is judged by the files it leaves behind, nothing else.
What is killed next and when comes from a seed; a moment is a number of journal lines after the kill before, because
those advance with the study on a fast machine and on a slow one.
"""
