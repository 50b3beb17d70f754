"""Scoring: captions beside their references, as the COCO evaluation counts."""
