/*
 * Prints each message of the FUSE protocol as the kernel's header lays it out: name, and bytes in hex. Its output is layout.txt:
 *
 *     cc layout.c -o layout && ./layout > layout.txt
 *
 * Little-endian, protocol 7.38 or later (linux-libc-dev). struct fuse_statx_in is of 7.39 and so written out here.
 */
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>
#include <stddef.h>
static unsigned char b[4096]; static int n;
static void put(const void*p,int l){memcpy(b+n,p,l);n+=l;}
static void out(const char*name){printf("%s ",name);for(int i=0;i<n;i++)printf("%02x",b[i]);puts("");n=0;}
static void req(int op, const void*p,int l,const void*q,int m,const char*name){
 struct fuse_in_header h={.len=40+l+m,.opcode=op,.unique=0x1122334455667788ull,.nodeid=7,.uid=1000,.gid=1001,.pid=4242};
 put(&h,40);put(p,l);put(q,m);out(name);}
#define R(op,s,tail,tl) req(op,&s,sizeof s,tail,tl,#op)
struct sx_in{uint32_t getattr_flags,reserved;uint64_t fh;uint32_t sx_flags,sx_mask;};
int main(){
 struct fuse_init_in in={7,44,131072,0x7ffffffb,0x3ff};R(FUSE_INIT,in,"",0);
 req(FUSE_LOOKUP,"",0,"ram",4,"FUSE_LOOKUP");
 struct fuse_forget_in fo={5};R(FUSE_FORGET,fo,"",0);
 struct fuse_batch_forget_in bf={2,0};struct fuse_forget_one ones[2]={{8,1},{9,3}};R(FUSE_BATCH_FORGET,bf,ones,sizeof ones);
 struct fuse_getattr_in ga={FUSE_GETATTR_FH,0,77};R(FUSE_GETATTR,ga,"",0);
 struct fuse_setattr_in sa={.valid=FATTR_MODE|FATTR_GID|FATTR_SIZE|FATTR_ATIME_NOW|FATTR_ATIME|FATTR_MTIME|FATTR_FH|FATTR_CTIME|FATTR_KILL_SUIDGID,.fh=77,.size=1ull<<33,.lock_owner=99,.atime=1,.mtime=-2,.ctime=3,.atimensec=4,.mtimensec=5,.ctimensec=6,.mode=0100644,.uid=11,.gid=12};R(FUSE_SETATTR,sa,"",0);
 req(FUSE_SYMLINK,"ln\0../x/y",10,"",0,"FUSE_SYMLINK");
 struct fuse_mknod_in mk={0100600,0,022};R(FUSE_MKNOD,mk,"f",2);
 struct fuse_mkdir_in md={0755,022};R(FUSE_MKDIR,md,"d",2);
 struct fuse_rename_in rn={9};R(FUSE_RENAME,rn,"old\0new",8);
 struct fuse_rename2_in rn2={9,2};R(FUSE_RENAME2,rn2,"old\0new",8);
 struct fuse_link_in li={10};R(FUSE_LINK,li,"hard",5);
 struct fuse_open_in op={02,0};R(FUSE_OPEN,op,"",0);
 struct fuse_create_in cr={0102,0100640,027,0};R(FUSE_CREATE,cr,"new",4); R(FUSE_TMPFILE,cr,"/",2);
 struct fuse_read_in rd={77,4096,131072,FUSE_READ_LOCKOWNER,99,02};R(FUSE_READ,rd,"",0);R(FUSE_READDIRPLUS,rd,"",0);
 struct fuse_write_in wr={77,8192,5,FUSE_WRITE_CACHE,99,02};R(FUSE_WRITE,wr,"hello",5);
 struct fuse_release_in re={77,02,1,99};R(FUSE_RELEASE,re,"",0);
 struct fuse_flush_in fl={77,0,0,99};R(FUSE_FLUSH,fl,"",0);
 struct fuse_fsync_in fs={77,FUSE_FSYNC_FDATASYNC};R(FUSE_FSYNC,fs,"",0);
 struct fuse_access_in ac={4};R(FUSE_ACCESS,ac,"",0);
 struct fuse_interrupt_in it={0x42};R(FUSE_INTERRUPT,it,"",0);
 struct fuse_fallocate_in fa={77,4096,65536,3};R(FUSE_FALLOCATE,fa,"",0);
 struct fuse_lseek_in ls={77,4096,4};R(FUSE_LSEEK,ls,"",0);
 struct fuse_getxattr_in gx={256};R(FUSE_GETXATTR,gx,"user.a/b",9);R(FUSE_LISTXATTR,gx,"",0);
 struct fuse_setxattr_in sx={3,1};req(FUSE_SETXATTR,&sx,FUSE_COMPAT_SETXATTR_IN_SIZE,"user.a\0xyz",10,"FUSE_SETXATTR");
 struct fuse_poll_in po={77,88,1,5};R(FUSE_POLL,po,"",0);
 struct fuse_notify_retrieve_in nr={0,4096,3};R(FUSE_NOTIFY_REPLY,nr,"abc",3);
 struct fuse_copy_file_range_in cf={77,1,8,78,2,3,0};R(FUSE_COPY_FILE_RANGE,cf,"",0);
 struct sx_in st={1,0,77,0x100,0xfff};req(52,&st,sizeof st,"",0,"FUSE_STATX");
#define O(s,name) put(&s,sizeof s);out(name)
 struct fuse_attr at={.ino=2,.size=1ull<<33,.blocks=3,.atime=4,.mtime=5,.ctime=-6,.atimensec=7,.mtimensec=8,.ctimensec=9,.mode=0100644,.nlink=1,.uid=10,.gid=11,.blksize=4096};
 struct fuse_entry_out eo={.nodeid=2,.generation=3,.entry_valid=4,.attr_valid=5,.entry_valid_nsec=6,.attr_valid_nsec=7,.attr=at};O(eo,"entry");
 struct fuse_attr_out ao={.attr_valid=5,.attr_valid_nsec=7,.attr=at};O(ao,"attr");
 struct fuse_open_out oo={77,FOPEN_KEEP_CACHE};O(oo,"open");
 struct fuse_write_out wo={4096};O(wo,"write");
 struct fuse_statfs_out so={{1,2,3,4,5,6,255,4096}};O(so,"statfs");
 struct fuse_lseek_out lo={4096};O(lo,"lseek");
 struct fuse_init_out io={.major=7,.minor=40,.max_readahead=1,.flags=(unsigned)0x804265e021ull,.max_background=64,.congestion_threshold=48,.max_write=1<<20,.time_gran=1,.max_pages=256,.flags2=0x80};O(io,"init");
 struct fuse_dirent de={2,3,5,8};put(&de,FUSE_NAME_OFFSET);put("hello\0\0\0",8);out("dirent");
 put(&eo,sizeof eo);put(&de,24);put("hello\0\0\0",8);out("direntplus");
 struct fuse_notify_inval_inode_out ii={2,4096,8192};O(ii,"inval_inode");
 struct fuse_notify_inval_entry_out ie={1,3};put(&ie,sizeof ie);put("ram",4);out("inval_entry");
 struct fuse_notify_delete_out d={1,2,3};put(&d,sizeof d);put("ram",4);out("delete");
 struct fuse_notify_store_out s={2,4096,5};O(s,"store");
}
