"""What every engine needs of the plugin: settings, log lines, reports and the summary."""
