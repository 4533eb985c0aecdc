//! Gives the shared library the name that programs look for at run time, with the number of its ABI.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libxpm.so.0");
    println!("cargo:rerun-if-changed=build.rs");
}
