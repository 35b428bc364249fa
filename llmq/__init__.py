"""llmq makes models small and proves what it cost."""

__version__ = "0.1.0"
