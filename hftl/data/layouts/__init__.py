"""Supported layouts of datasets: COCO, Pascal VOC, mask folders, in-memory rows, embedded digits."""
