"""What a run showed: traces, the report, the live meter, the audit log."""
