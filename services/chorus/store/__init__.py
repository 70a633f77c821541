"""What is kept on disk or shared between coordinators; decisions about it are core's."""
