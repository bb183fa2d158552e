"""Quantisation-aware distillation: a student with fake-quantised linears learns its teacher's distribution."""
