//! The C library: [`xpm_mapping`] for programs in C, C++ and whatever can call C. `include/xpm.h` is made from
//! this by cbindgen, so what C programmers have to know is said at each function.

#![allow(unsafe_code)]
#![allow(non_camel_case_types, reason = "the names of C")]

pub mod error;
pub mod mapping;
pub mod options;
pub mod space;
