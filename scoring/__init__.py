"""Scoring: metrics of captions against their references, as in the COCO evaluation."""
