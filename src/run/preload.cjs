// Replaced by the real one.
"use strict";
