"""What everything else stands on: errors, files, plug-ins, options, images."""
