"""The other peer: a dev edge built on general-purpose libraries, independent of the engines that it tests."""
