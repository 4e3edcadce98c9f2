//! Both fetched releases compile, and say what is wrong when they cannot.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tilefold_emulator_nvrtc::{Nvrtc, NvrtcError, Release, Target, tool};

const SOURCE: &str = r#"extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }"#;

#[test]
fn both_releases_give_ptx_and_cubins() {
    for release in Release::ALL {
        let nvrtc = Nvrtc::fetched(release).unwrap();
        assert_eq!(nvrtc.version(), release.version());
        let ptx = nvrtc.compile(SOURCE, Target::Ptx("compute_80"), &["--std=c++17"]).unwrap();
        let text = ptx.text().unwrap();
        assert!(text.contains(".entry twice(") && text.contains(".target sm_80") && text.ends_with('\n'), "{text}");
        let cubin = nvrtc.compile(SOURCE, Target::Cubin("sm_80"), &["--ptxas-options=-v"]).unwrap();
        assert!(cubin.code.starts_with(b"\x7fELF") && cubin.text().is_err());
        assert!(cubin.log.contains("registers"), "{}", cubin.log);
    }
}

#[test]
fn a_refusal_has_the_compilers_words() {
    let nvrtc = Nvrtc::fetched(Release::Newest).unwrap();
    let refused = nvrtc.compile("void f() { g(); }", Target::Ptx("compute_80"), &[]).unwrap_err();
    assert!(refused.to_string().contains("identifier \"g\" is undefined"), "{refused}");
    assert!(matches!(refused, NvrtcError::Refused { version: (13, 5), .. }));
    let option = nvrtc.compile(SOURCE, Target::Ptx("compute_80"), &["--no-such-option"]).unwrap_err();
    assert!(matches!(option, NvrtcError::Call { call: "nvrtcCompileProgram", .. }), "{option}");
    assert!(matches!(nvrtc.compile("\0", Target::Cubin("sm_80"), &[]), Err(NvrtcError::Nul { what: "source" })));
}

#[test]
fn what_is_not_there_is_named() {
    let error = tool("no-such-tool").unwrap_err();
    assert!(error.to_string().contains("cargo xtask setup"), "{error}");
    assert!(matches!(Nvrtc::load("/no/such/libnvrtc.so".as_ref()), Err(NvrtcError::Load { .. })));
    assert!(tool("nvdisasm").is_ok() && tool("cuobjdump").is_ok());
}
