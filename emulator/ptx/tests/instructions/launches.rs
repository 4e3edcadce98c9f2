//! Whole small kernels: parameters, ids, branches, shared memory, barriers.

use tilefold_emulator_ptx::{Launch, Memory, Module, run};

#[test]
fn fill_writes_every_element_and_no_other() {
    let module = Module::parse(FILL).unwrap();
    let kernel = module.kernel("fill").unwrap();
    let memory = Memory::new(1 << 20);
    let address = memory.allocate(4 * 1000).unwrap();
    let mut parameters = address.to_le_bytes().to_vec();
    parameters.extend(1000u32.to_le_bytes());
    parameters.extend(2.5f32.to_le_bytes());
    let launch = Launch {
        kernel,
        module: &module,
        grid: [8, 1, 1],
        block: [128, 1, 1],
        dynamic_shared_bytes: 0,
        parameters: &parameters,
    };
    let statistics = run(&memory, &launch).unwrap();
    let mut bytes = vec![0; 4000];
    memory.read(address, &mut bytes).unwrap();
    for (i, value) in bytes.as_chunks::<4>().0.iter().enumerate() {
        assert_eq!(f32::from_le_bytes(*value), 2.5 + i as f32);
    }
    assert_eq!(statistics.blocks, 8);
}

const FILL: &str = "
.version 8.0
.target sm_80
.address_size 64
.visible .entry fill(
	.param .u64 fill_param_0,
	.param .u32 fill_param_1,
	.param .f32 fill_param_2
)
{
	.reg .pred 	%p<2>;
	.reg .f32 	%f<4>;
	.reg .b32 	%r<6>;
	.reg .b64 	%rd<5>;

	ld.param.u64 	%rd1, [fill_param_0];
	ld.param.u32 	%r2, [fill_param_1];
	ld.param.f32 	%f1, [fill_param_2];
	mov.u32 	%r3, %ctaid.x;
	mov.u32 	%r4, %ntid.x;
	mov.u32 	%r5, %tid.x;
	mad.lo.s32 	%r1, %r3, %r4, %r5;
	setp.ge.u32 	%p1, %r1, %r2;
	@%p1 bra 	$L__BB0_2;

	cvta.to.global.u64 	%rd2, %rd1;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd2, %rd3;
	cvt.rn.f32.u32 	%f2, %r1;
	add.f32 	%f3, %f2, %f1;
	st.global.f32 	[%rd4], %f3;

$L__BB0_2:
	ret;
}
";
